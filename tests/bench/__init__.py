"""`make bench`: how long building, starting and creating guests takes, against stock Debian, in one run."""
