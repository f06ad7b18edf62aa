"""LoRA-GA in other people's training frameworks. Each module needs its framework, which we do not depend on."""
