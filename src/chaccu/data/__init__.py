"""Raw dumps to clean, deduplicated, split conversations, with a ledger that names every drop and every change.

The way through the room: `sources` finds files and opens them, `framing` cuts their bytes into records, a reader out of
`readers` makes a `Draft` of each, the `steps` of a `CleanConfig` judge it, `clean` writes what is kept, the `ledger` and
the `report`.
"""
