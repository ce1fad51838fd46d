"""Images over HTTP: an API, a queue, replicas and a page on the engine of sampling/; importing it starts nothing."""
