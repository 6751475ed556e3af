"""`python cli.py ...` from a checkout: the same command as `retrofit`."""

from retrofit.cli.main import main

if __name__ == "__main__":
    main()
