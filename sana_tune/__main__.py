"""python -m sana_tune"""

from sana_tune.cli.main import main

if __name__ == "__main__":
    main()
