"""`python -m data.shards SOURCE OUT`: the command of data/write_shards.py under its short name."""
from data.write_shards import main

if __name__ == "__main__":
    main()
