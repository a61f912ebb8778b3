"""`tissue-train` on the command line; `tissue-train --help` lists what it can do."""

import sys


def main() -> None:
    try:
        from training.commands import cli
    except ModuleNotFoundError as missing:
        sys.exit(f"tissue-train needs {missing.name}, as the service doesn't: pip install '.[train]' in its repository")
    cli()


if __name__ == "__main__":
    main()
