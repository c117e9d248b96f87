"""Nothing of it is used."""

decode_jpeg = ImageReadMode = None
