"""The report of one training round: what was decided and why, as one HTML file that needs nothing else.

A radiologist and a physicist read it, on paper too. It loads nothing, runs nothing and names no patient: numbers are
HTML with small inline drawings, curves are SVG and slices PNG inside the page. matplotlib is used through its objects
only: a server draws reports in threads.
"""
