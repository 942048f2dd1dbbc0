"""`python -m lachesis.envs.gsm8k serve --env.rollout_server_url … --openai.base_url …`: Atropos' own command line."""

from lachesis.envs.gsm8k.env import Env

if __name__ == "__main__":
    Env.cli()
