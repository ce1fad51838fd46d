"""A hint for users of the former name of the command."""
import sys

if __name__ == "__main__":
    sys.exit("python -m safety is now python moderate.py, with the same arguments: "
             + " ".join(["python moderate.py", *sys.argv[1:]]))
