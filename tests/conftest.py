import torch

# the models are tiny: more threads only wait for each other, for minutes on a busy machine
torch.set_num_threads(1)
