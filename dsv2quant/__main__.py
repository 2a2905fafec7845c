"""`python -m dsv2quant` is the `dsv2quant` command."""

from dsv2quant.cli.main import main

if __name__ == "__main__":
    main()
