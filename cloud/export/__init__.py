"""The usage feed: stored records leave as CloudEvents, by a consumer with a durable position."""
