"""The controller's database. It can always be rebuilt from the vaults; its jobs are what a crash is settled from."""
