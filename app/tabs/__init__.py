"""One file a tab: its components, its events, and what answers them. What is shown comes from `views`."""
