"""Bodies of OpenAI's and Anthropic's APIs into one kind of job, and answers back into theirs."""
