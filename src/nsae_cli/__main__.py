"""``python -m nsae_cli``: the `nsae` command, where it is not on the PATH, as in a job of a cluster."""

from nsae_cli.cli.app import main

if __name__ == "__main__":
    main()
