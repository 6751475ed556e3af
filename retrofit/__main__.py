"""`python -m retrofit`."""

from retrofit.cli.app import main

if __name__ == "__main__":
    main()
