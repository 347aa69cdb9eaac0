"""From files, folders and hub ids to tokens on disk; `prepare` is the entrance."""
