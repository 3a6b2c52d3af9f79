"""The `kurtail` command: a dispatcher, the Lightning CLI for trainer verbs, and one function per other verb."""
