"""`python -m hybridpar`: the command line where the `hybridpar` script is not on PATH."""

from hybridpar.cli import main

if __name__ == "__main__":
    main()
