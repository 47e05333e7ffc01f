"""HTTP and WebSockets: requests in, answers out, what is counted and told on the way."""
