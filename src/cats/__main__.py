"""``python -m cats``: the command ``cats``, also where no script of that name is installed."""

from cats.cli import main

if __name__ == "__main__":
    main()
