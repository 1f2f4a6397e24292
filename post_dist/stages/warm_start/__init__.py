"""The public prompt that private tuning starts from."""
