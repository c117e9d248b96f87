"""Writing blocks into a consumer's memory from a node's: where they belong there (`table`), the writing
itself (`writer`), and the consumer as the destination of a restore (`destination`)."""
