"""The queues of a gateway: asks the scheduling policy and carries out the policy's instructions."""
