"""`python -m fxquant`: the command line."""

from fxquant.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
