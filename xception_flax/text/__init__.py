"""What people write and read: names, numbers and the messages about them."""
