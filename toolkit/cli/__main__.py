"""`python -m noisyssl.cli`, where the console script is not on the path."""

from noisyssl.cli import main

main()
