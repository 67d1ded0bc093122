"""A pool behind OpenAI's HTTP interface. Needs the extra `phatgoose[serve]`."""
