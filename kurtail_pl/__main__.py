"""`python -m kurtail_pl` is `kurtail`."""

from kurtail_pl.cli.main import main

if __name__ == "__main__":
    main()
