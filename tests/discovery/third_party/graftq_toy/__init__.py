"""What a third party writes to bring graftq into a framework."""
