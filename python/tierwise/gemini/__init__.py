"""The nn.Module and torch.optim face of the engine: module hooks become operations, parameters become views into chunks."""
