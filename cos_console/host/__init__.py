"""Looking. Every descriptor here is opened O_RDONLY; nothing is mounted, replayed or written."""
