"""What can become of a key: the headings of an import's report, in their order."""

UNSUPPORTED, BEFORE, TRANSLATED, DEFAULTS, MEANINGLESS = HEADINGS = (
    "Not supported here, and what to do instead",
    "Before training",
    "Translated",
    "Not given, so the default of {title} is written",
    "Without meaning here",
)
OFF = "switched off there"
