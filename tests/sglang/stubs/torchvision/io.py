"""Nothing of it is used."""

decode_image = decode_jpeg = ImageReadMode = None
