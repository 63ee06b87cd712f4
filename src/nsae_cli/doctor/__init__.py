"""`nsae doctor`: what this machine and installation are, and what stands in the way. `examine` runs all sections.

Every section is a file with one function that yields checks; each imports what it looks at itself, so that a broken
library is a finding and not the end of the report. `redaction` makes the result fit to be pasted into a public issue.
"""
