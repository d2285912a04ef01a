"""The reference cloud: grants rights, signs them for each vehicle, takes and rates usage."""
