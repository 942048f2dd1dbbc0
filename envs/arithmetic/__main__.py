"""`python -m lachesis.envs.arithmetic serve --env.rollout_server_url … --openai.base_url …`: Atropos' own command line."""

from lachesis.envs.arithmetic.env import Env

if __name__ == "__main__":
    Env.cli()
