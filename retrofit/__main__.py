"""`python -m retrofit`."""

from retrofit.cli.main import main

if __name__ == "__main__":
    main()
