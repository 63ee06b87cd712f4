"""Artifacts at URLs: s3://, gs://, hf:// and whatever else fsspec opens. The commands work on local folders.

- `places`: URLs, what of them may be shown, and where their local copy lies.
- `objects`: reading, writing and listing below a URL, with retries.
- `lease`: one writer per artifact where there are no locks: an object that is renewed while its holder lives.
- `mirror`: the local copy of what is below a URL: brought file by file, each checked.
- `progress`: what an unfinished artifact has at its URL, put where the same command goes on from it.
- `uploads`: what becomes durable in the local copy goes to the URL, the completion mark last.
- `workspace`: `--workspace URL`, and artifacts that are named by a URL.
"""
