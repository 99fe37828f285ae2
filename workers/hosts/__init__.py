"""Where hypervisors run: implementations of `contract.hosts.Host`."""
