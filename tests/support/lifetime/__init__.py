"""Months of one vehicle's life in virtual time: engine, journal, link, cloud and vehicle under faults."""
