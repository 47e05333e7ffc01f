"""Shared conversations out of the web: pages or a paged JSON API, described by a small YAML file, to conversation JSONL.

`description` says which pages there are and where they keep what; `fetch` gets one page politely (`robots`, `pace`,
`addresses`), `store` keeps it as it came, `extract` finds its links and conversations, `run` walks from the first page to the
last.
"""
