"""`python -m oneblock`: the same as the command `oneblock`."""

from oneblock.cli import end

if __name__ == "__main__":
    end()
