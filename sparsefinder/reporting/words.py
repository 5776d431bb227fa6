"""Headings that a report and the summary of a run have in common."""

RECALL = "Recall of gold edges at equal density (± half the 95 % interval over documents; * compares every pair)"
COMPARED = "Every attention at every length, in the model, on the same words"
MEASURED = "Each configuration as it was asked for, means over samples, layers and heads"
ADVANTAGE = "The best sub-quadratic pattern of ours minus the best published one (95 % interval, paired over documents)"
RECALL_BY_COST = (
    "Recall of gold edges at equal total cost: multiplications of prediction and attention, as a share of those of dense "
    "attention over all allowed pairs (± as above)"
)
ADVANTAGE_BY_COST = "The best sub-quadratic pattern of ours minus the best of all others at equal total cost (as above)"
ADVANTAGE_OVER_ALL = (
    "The best sub-quadratic pattern of ours minus the best of all others, those that compare every pair among them, at equal "
    "density (95 % interval, paired over documents)"
)
TO_HOVER = (
    "Every configuration is a point: hover or tap one for its numbers. A line joins the configurations of a pattern "
    "that no other one of it beats, paler points are beaten; up and to the right is better. A click on a name shows "
    "or hides a pattern. Dashed lines: predicting compares every pair (open markers) or knows the true scores (filled), so "
    "it saves no work by itself. The dotted vertical is the mean density of the gold graph, the star that graph "
    "itself, random what chance recalls. A window and global tokens count as predicted."
)
