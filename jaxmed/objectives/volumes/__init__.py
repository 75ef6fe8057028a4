"""Methods made for volumes: what lies where, and what is the same in different people."""
