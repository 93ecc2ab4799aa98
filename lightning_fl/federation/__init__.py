"""The life of a round, without Lightning: what a simulation, a job, a coordinator and a gossiping node all call."""
