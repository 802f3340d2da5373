"""Quality reports: one self-contained page of HTML about one slide file.

``findings.collect`` gathers what is known of a file, ``page.draw`` makes the page.
"""
