"""The configuration: TOML, environment and credentials -> frozen `Settings`, or errors that help.

    loading       load, refresh: the whole of it, in its order
    given         the file and the environment: raw values, and what is no key
    decoding      raw values by the types of their keys; what contradicts itself
    apps          the keys and users that apps are known by, and who claims them
    credentials   the agent's own secrets: given, in a file, or handed over by systemd
    places        where file, credentials and outbox lie on this machine
    loaded        what came of it, for whoever asks

The keys are declared in `agent.settings`, and `agent.keys` has them as a table; here their values
are found, and where each came from. Two kinds of fault:

    ConfigError   a value that cannot be meant (unknown key, bad unit, out of range): the daemon
                  does not start. All of them at once, one line each.
    problem       something outside the file is not right yet (no key file, no certificate): a
                  sentence in `Loaded.problems`. The daemon runs and stores; events wait.

Does not own what a setting does.
"""
