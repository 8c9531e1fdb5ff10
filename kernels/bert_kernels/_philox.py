"""The numbers of Philox 4x32 (Salmon et al., SC11), for all who compute it on a CPU."""

NUM_ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF
