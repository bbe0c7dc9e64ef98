"""What a run leaves to use: the champion's weights, the schedule that was found, and its replay."""
