"""What an interrupted stage needs to continue, written so that it is whole or absent."""
