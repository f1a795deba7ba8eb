"""Several hosts on one machine, made of namespaces: see cluster.py."""
